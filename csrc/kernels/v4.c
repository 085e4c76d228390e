/* The bodies for x86-64-v4 (AVX-512 F, BW, CD, DQ, VL): vectors of 64 bytes. */
#if defined(__x86_64__)

#    define FLORA_ISA v4
#    define FLORA_VECTOR_BYTES 64
#    define FLORA_REGISTERS 32
#    include "each.h"

#endif
