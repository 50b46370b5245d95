// Preloaded: one allocation of a ggml buffer fails, see test_out_of_memory.py
#include <stddef.h>

// the function that this one stands before: libggml-base is not among those that dlsym(RTLD_NEXT) searches
void * (*fail_alloc_next)(void *, size_t);

// how many allocations still succeed. -1: all
int fail_alloc_left = -1;

void * ggml_backend_buft_alloc_buffer(void * buft, size_t size) {
    if (fail_alloc_left >= 0 && fail_alloc_left-- == 0) {
        return NULL;
    }
    return fail_alloc_next(buft, size);
}
