"""One module per operation: reference, fake kernels, autograd, public function, in that order."""
