// Generate text in C++: one package, made in Python, run here without Python.
//
// 1. Make the package: prefill and decode compiled ahead of time, weights and kernels inside.
//
//      python -c "
//      import torch
//      from hybrid_flex import HybridConfig, HybridLanguageModel, export
//      model = HybridLanguageModel(HybridConfig(vocab_size=256, hidden_size=64, pattern='KKKS', num_heads=2, topk=16))
//      export.package(model, 'model.pt2')"
//
// 2. Build this program with the libtorch that was installed with Python's torch:
//
//      cmake -S examples/cpp -B build -DCMAKE_PREFIX_PATH="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
//      cmake --build build
//
// 3. Run it: a package, how many tokens to add, the prompt's tokens. It prints the new tokens.
//
//      build/generate model.pt2 20  72 101 108 108 111
//
// A package is compiled for one kind of device and one version of torch; the program follows the package's device.
//
// What it relies on: the package holds two models, all inputs and outputs plain tensors in a fixed order,
//
//      prefill   ids [B, T] int64              -> logits [B, T, vocab], state 0, state 1, ...
//      decode    token [B] int64, state 0, ... -> logits [B, vocab],    state 0, state 1, ...
//
// A state may be written where it lies and is handed back in any case: each step goes on from what the last returned.

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

using torch::inductor::AOTIModelPackageLoader;

struct Request {
  std::string package;
  int64_t num_tokens;
  std::vector<int64_t> prompt;
};

int64_t to_number(const char* text, const char* what) {
  char* end = nullptr;
  const int64_t number = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || number < 0) {
    throw std::invalid_argument(std::string("generate: ") + what + " must be a number from 0, got " + text);
  }
  return number;
}

Request read_request(int argc, char** argv) {
  if (argc < 4) {
    throw std::invalid_argument("usage: generate PACKAGE NUM_TOKENS PROMPT_TOKEN [PROMPT_TOKEN ...]");
  }
  Request request{argv[1], to_number(argv[2], "NUM_TOKENS"), {}};
  if (!std::filesystem::is_regular_file(request.package)) {
    throw std::invalid_argument("generate: PACKAGE must name an existing file, got " + request.package);
  }
  for (int i = 3; i < argc; ++i) {
    request.prompt.push_back(to_number(argv[i], "PROMPT_TOKEN"));
  }
  return request;
}

// What was written into the package when it was made; empty for what was not.
std::string about(AOTIModelPackageLoader& loader, const std::string& key) {
  const auto metadata = loader.get_metadata();
  const auto found = metadata.find(key);
  return found == metadata.end() ? "" : found->second;
}

c10::Device device_of(AOTIModelPackageLoader& loader) {
  const auto device = about(loader, "AOTI_DEVICE_KEY");
  return c10::Device(device.empty() ? "cpu" : device);
}

// Compiled code refuses a token or a length that is out of range in its own words, some on a GPU with none at all.
void check_request(const Request& request, AOTIModelPackageLoader& loader) {
  if (const auto most = about(loader, "hybrid_flex.max_length"); !most.empty()) {
    const auto tokens = static_cast<int64_t>(request.prompt.size()) + request.num_tokens;
    if (tokens > std::stoll(most)) {
      throw std::invalid_argument("generate: prompt and NUM_TOKENS must be at most " + most +
                                  " tokens together, got " + std::to_string(tokens));
    }
  }
  if (const auto size = about(loader, "hybrid_flex.vocab_size"); !size.empty()) {
    for (const int64_t token : request.prompt) {
      if (token >= std::stoll(size)) {
        throw std::invalid_argument("generate: PROMPT_TOKEN must be below " + size + ", got " + std::to_string(token));
      }
    }
  }
}

// The likeliest token of each sequence, [B], from logits [B, vocab].
at::Tensor greedy(const at::Tensor& logits) {
  return logits.argmax(-1);
}

std::vector<int64_t> generate(const Request& request) {
  const c10::InferenceMode no_gradients;
  AOTIModelPackageLoader prefill(request.package, "prefill");
  AOTIModelPackageLoader decode(request.package, "decode");
  check_request(request, prefill);
  const auto device = device_of(prefill);

  const at::Tensor ids = at::tensor(request.prompt, at::kLong).unsqueeze(0).to(device);
  // The first output is the logits, the others are the states; decode takes a token in place of the logits.
  std::vector<at::Tensor> carried = prefill.run({ids});
  carried[0] = carried[0].select(1, carried[0].size(1) - 1);

  std::vector<int64_t> tokens;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < request.num_tokens; ++i) {
    if (i > 0) {
      carried = decode.run(carried);
    }
    carried[0] = greedy(carried[0]);
    tokens.push_back(carried[0].item<int64_t>());
  }
  const std::chrono::duration<double, std::milli> elapsed = std::chrono::steady_clock::now() - begin;
  if (tokens.size() > 1) {
    std::cerr << elapsed.count() / static_cast<double>(tokens.size() - 1) << " ms per token\n";
  }
  return tokens;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    for (const int64_t token : generate(read_request(argc, argv))) {
      std::cout << token << ' ';
    }
    std::cout << '\n';
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
