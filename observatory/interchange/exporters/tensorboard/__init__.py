"""A run as TensorBoard shows it: values over steps, and traces for its plugin of PyTorch's profiler."""
