// Which GPUs the CUDA library has code for, in CMake's words: "80-real,90-real,90-virtual".
#if defined(FASTKD_CUDA_ARCHITECTURES)
extern "C" __attribute__((visibility("default"))) const char* fastkd_cuda_architectures() { return FASTKD_CUDA_ARCHITECTURES; }
#endif
