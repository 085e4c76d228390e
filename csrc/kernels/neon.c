/* The bodies for aarch64, every CPU of which has NEON: vectors of 16 bytes. */
#if defined(__aarch64__)

#    define FLORA_ISA neon
#    define FLORA_NEON
#    define FLORA_VECTOR_BYTES 16
#    define FLORA_REGISTERS 32
#    include "each.h"

#endif
