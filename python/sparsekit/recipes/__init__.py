"""Published systems as short recipes over sparsekit's ops: how each chooses what attention looks at.

    from sparsekit.recipes import XAttention

    out = XAttention(threshold=0.9)(query, key, value)             # [B, Hq, Sq, D], causal, as at the start of a prompt
    pattern = XAttention(threshold=0.9).choose(query, key)         # what it chose: a BlockPattern, or Stripes

A recipe is a frozen dataclass; its parameters have the paper's names, and what it leaves out of the paper stands in its
docstring. It changes the output: what it costs on a real model is in docs/recipes.md. In a Hugging Face model:
`sparsekit.integrations.transformers.register(recipe)`.

Recipes for tokens and caches are modules of functions: `recipes.tome` (Token Merging), `recipes.kivi`, `recipes.gear`,
`recipes.zipcache` (quantized caches).
"""

from .anchor_attention import AnchorAttention
from .flex_prefill import FlexPrefill
from .minference import AShape, BlockSparse, MInference, VerticalSlash
from .mminference import MMInferenceGrid
from .recipe import Recipe, Stripes
from .sample_attention import SampleAttention
from .seer_attention import AttentionGate, SeerAttention
from .sparge_attn import SpargeAttn
from .streaming_llm import StreamingLLM
from .token_sparse_attention import TokenSparseAttention
from .x_attention import XAttention

__all__ = [
    "AShape",
    "AnchorAttention",
    "AttentionGate",
    "BlockSparse",
    "FlexPrefill",
    "MInference",
    "MMInferenceGrid",
    "Recipe",
    "SampleAttention",
    "SeerAttention",
    "SpargeAttn",
    "StreamingLLM",
    "Stripes",
    "TokenSparseAttention",
    "VerticalSlash",
    "XAttention",
]
