"""Decoding on a server: requests of different lengths share one pool of pages, and come and go while others run.

python examples/decode_from_pages.py
"""

import torch

from hybrid_flex import DeepSeekSparseMLA

PAGE = 16


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layer = DeepSeekSparseMLA(
        64, 4, kv_lora_rank=32, qk_nope_head_dim=16, v_head_dim=16, topk=16, index_heads=2, index_head_dim=16
    )
    # Two seats of at most 96 tokens, and a pool of 8 pages; nobody has a page yet.
    cache = layer.init_cache(2, max_length=96, page_size=PAGE, num_pages=8)
    assert cache.block_table is not None
    free = list(range(8))
    requests: list[torch.Tensor] = []  # all hidden states of each seat's request, to compare with

    def admit(seat: int, length: int) -> torch.Tensor:
        """Give a request its pages, prefill it alone, and copy the result into them."""
        cache.block_table[seat] = -1
        for i in range(-(-length // PAGE)):
            cache.block_table[seat, i] = free.pop()
        prompt = torch.randn(1, length, 64)
        layer.fill_cache(cache, seat, layer(prompt)[1])
        return prompt

    def run(steps: int) -> None:
        for _ in range(steps):
            for seat, length in enumerate(cache.lengths.tolist()):
                if length % PAGE == 0:  # the next token begins a page
                    cache.block_table[seat, length // PAGE] = free.pop()
            x = torch.randn(2, 1, 64)
            y = layer.decode(x, cache)
            for seat in range(2):
                requests[seat] = torch.cat((requests[seat], x[seat : seat + 1]), 1)
                error = (y[seat, 0] - layer(requests[seat])[0][0, -1]).abs().max().item()
                assert error < 1e-5, error
        print(f"{steps} steps; lengths {cache.lengths.tolist()}, pages {cache.block_table.tolist()}, free {free}")

    requests += [admit(0, 40), admit(1, 7)]
    run(12)
    free += [page for page in cache.block_table[0].tolist() if page >= 0]  # the first request has ended
    requests[0] = admit(0, 21)
    run(15)
    print(
        f"every step equals a full pass over its request; the pool holds {tuple(cache.kv.shape)}, the last page spare"
    )


if __name__ == "__main__":
    main()
