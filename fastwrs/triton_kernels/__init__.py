"""The Triton kernels. Imported when the backend first runs: nothing else needs Triton."""
