"""A model as files: programs with open batch and length, programs that need torch alone, and a compiled package.

python examples/export_and_run.py              # programs, a few seconds
python examples/export_and_run.py --package    # and an AOTInductor package, about a minute
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hybrid_flex import HybridConfig, HybridLanguageModel, export

MAX_LENGTH = 128
GENERATE = """
import sys, torch
sys.modules["hybrid_flex"] = None                                      # whoever runs this need not have it
prefill, decode = (torch.export.load(path).module() for path in sys.argv[1:])
ids = torch.arange(10)[None]
logits, states = prefill(ids)
token, text = logits[:, -1].argmax(-1), []
for _ in range(20):
    text.append(token.item())
    logits, states = decode(token, states)
    token = logits.argmax(-1)
print(text)
"""


def main(with_package: bool) -> None:
    torch.manual_seed(0)
    model = HybridLanguageModel(HybridConfig(hidden_size=32, pattern="KS", num_heads=2, topk=8)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)  # untrained, it would write one token over and over
    ids = torch.arange(10)[None]
    text = model.generate(ids, 20, greedy=True)[0, 10:].tolist()

    with tempfile.TemporaryDirectory() as folder:
        # Opaque programs: our operators are single nodes, gradients flow, any batch and length goes in.
        path = Path(folder) / "model.pt2"
        export.save(export.export_prefill(model), path)
        run = export.runner(export.load(path))
        for shape in ((1, 17), (3, 100)):
            more = torch.randint(256, shape)
            torch.testing.assert_close(run(more)[0], model(more)[0])
        print(f"{path.name}: {path.stat().st_size:,} bytes, equal to eager")
        try:
            run(torch.zeros(1, 5))
        except TypeError as error:
            print(error)

        # Portable programs: PyTorch's operators only, for a process that knows nothing of this library.
        steps = {
            "prefill": export.export_prefill(model, max_length=MAX_LENGTH),
            "decode": export.export_decode(model, max_length=MAX_LENGTH),
        }
        for name, program in steps.items():
            export.save(export.portable(program), Path(folder) / f"{name}.pt2")
        paths = [str(Path(folder) / f"{name}.pt2") for name in steps]
        done = subprocess.run([sys.executable, "-c", GENERATE, *paths], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(text)
        print("torch alone writes the same text:", text)

        # A package: both steps compiled into one file, for Python or C++ (examples/cpp).
        if with_package:
            package = export.load_package(export.package(model, Path(folder) / "package.pt2", max_length=MAX_LENGTH))
            assert package.generate(ids, 20, greedy=True)[0, 10:].tolist() == text
            print("and so does the package")


if __name__ == "__main__":
    main("--package" in sys.argv[1:])
