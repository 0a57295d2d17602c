"""Block-sparse attention inside other libraries. Each module needs its library only when it is used:

sparsekit.integrations.transformers   Hugging Face transformers >= 5: block-sparse attention
sparsekit.integrations.token_merging  transformers >= 5 and timm: Token Merging in ViTs and BERT-like encoders
"""
