#define PAGED_KV_AVX512
#include "kernels.h"
