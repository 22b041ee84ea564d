"""One module per operation: its public function first, then reference, fake kernels, autograd and checks."""
