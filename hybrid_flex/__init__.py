"""hybrid_flex: attention layers that mix Kimi Delta Attention and DeepSeek Sparse Attention, native to torch.compile."""
