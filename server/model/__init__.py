"""The frozen base model: loading, tokenizer, attention and KV cache as its graph sees them."""
