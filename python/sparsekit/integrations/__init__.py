"""Block-sparse attention inside other libraries. Each module needs its library only when it is used:

sparsekit.integrations.transformers   Hugging Face transformers >= 5
"""
