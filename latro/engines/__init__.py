"""The engines that sample rationales: transformers in this process, or a vLLM server."""
