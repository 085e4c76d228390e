/* Real threads behind the names that csrc/parallel.c looks for: GNU OpenMP's here, PyTorch's in a library of its own.
 */
#ifndef POOL_H
#define POOL_H

/* How many threads a loop may have; `careless`: a loop of PyTorch's leaves some of its work and reports an error. */
void pool_use(int threads, int careless);

#endif
