"""A stand-in for liger-kernel 0.8.5: the parameters of its fused linear cross-entropy, computed with plain torch."""

calls: list[str] = []
