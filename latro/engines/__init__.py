"""What samples rationales: transformers in this process, or a vLLM server."""
