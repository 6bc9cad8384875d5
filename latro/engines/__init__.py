"""The engines that sample rationales: transformers, or vLLM in this process or as a server."""
