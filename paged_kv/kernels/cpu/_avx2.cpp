#define PAGED_KV_AVX2
#include "kernels.h"
