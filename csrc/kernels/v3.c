/* The bodies for x86-64-v3 (AVX2, FMA, F16C): vectors of 32 bytes. */
#if defined(__x86_64__)

#    define FLORA_ISA v3
#    define FLORA_VECTOR_BYTES 32
#    define FLORA_REGISTERS 16
#    include "each.h"

#endif
