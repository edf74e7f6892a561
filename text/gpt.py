"""A small GPT: a pre-norm decoder-only transformer (Radford et al. 2019)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GPT(nn.Module):
    """Logits of the next token at every position.

    Args:
        input_shape: (sequence length,), the largest number of positions.
        vocab_size: number of different tokens.
        layers, heads, width: blocks; heads of each attention; numbers a position has.
        dropout: rate, after the embedding, in the attention and at the end of each branch.
        mlp: two linear layers with GELU between them, four times as wide, or SwiGLU of as many parameters (Shazeer,
            arXiv:2002.05202).
        positions: a learned vector each, or rotary (Su et al., arXiv:2104.09864).
        tied: the head's weight is the embedding's.
        bias: linear layers and norms have one.

    Shape: int64 (n, T) → (n, T, vocab_size).

    Raises:
        ValueError: heads do not divide the width, or an argument is none of those named.
    """

    def __init__(
        self,
        input_shape: tuple[int],
        vocab_size: int,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        positions: Literal["learned", "rotary"] = "rotary",
        tied: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        if mlp not in ("gelu", "swiglu") or positions not in ("learned", "rotary"):
            raise ValueError("mlp is gelu or swiglu, positions are learned or rotary")
        if positions == "rotary" and width // heads % 2:
            raise ValueError(f"rotary positions need heads of an even width, not {width // heads}")
        (length,) = input_shape
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(length, width) if positions == "learned" else None
        self.dropout = nn.Dropout(dropout)
        rotary = positions == "rotary"
        self.blocks = nn.ModuleList(Block(heads, width, dropout, mlp, rotary, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocab_size, bias=bias and not tied)
        self._initialise(layers)
        if tied:
            self.head.weight = self.embedding.weight

    def _initialise(self, layers: int) -> None:
        """N(0, 0.02²); the last layer of each residual branch is scaled by 1/√(2·layers), so that the sum over branches
        does not grow with depth."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                ends_a_branch = name.endswith(("attention.out", "mlp.out"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers) if ends_a_branch else 0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """x → x + attention(norm(x)), then x → x + mlp(norm(x)). Shape: (n, T, width) → the same."""

    def __init__(self, heads: int, width: int, dropout: float, mlp: str, rotary: bool, bias: bool):
        super().__init__()
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.attention = Attention(heads, width, dropout, rotary, bias)
        self.mlp = {"gelu": GELU, "swiglu": SwiGLU}[mlp](width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Attention(nn.Module):
    """Causal self-attention. Shape: (n, T, width) → the same."""

    def __init__(self, heads: int, width: int, dropout: float, rotary: bool, bias: bool):
        super().__init__()
        self.heads, self.rate, self.rotary = heads, dropout, rotary
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, 2))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        rate = self.rate if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


def rotated(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary positions: components i and i + d/2 at position t rotate by t · base^(−2i/d). Shape: (n, heads, T, d)."""
    length, d = x.shape[-2:]
    exponents = torch.arange(0, d, 2, device=x.device, dtype=torch.float32) / d
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * base**-exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class GELU(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.hidden, self.out = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(x)))


class SwiGLU(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        hidden = -(-8 * width // 3)
        self.gates_and_values, self.out = nn.Linear(width, 2 * hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gates, values = self.gates_and_values(x).chunk(2, -1)
        return self.out(F.silu(gates) * values)
