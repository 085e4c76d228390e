/* The bodies for any CPU: vectors of 16 bytes, which the compiler maps to SSE2, NEON or plain registers. */
#define FLORA_ISA portable
#define FLORA_VECTOR_BYTES 16
#define FLORA_REGISTERS 16
#include "each.h"
