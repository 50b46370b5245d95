// Preloaded: a ggml buffer is filled with a byte, or is not to be had. See test_out_of_memory.py and
// test_uninitialised_memory.py
#include <stddef.h>
#include <stdint.h>

// the function that this one stands before: libggml-base is not among those that dlsym(RTLD_NEXT) searches
void * (*alloc_next)(void *, size_t);

void (*alloc_clear)(void *, uint8_t);

// how many allocations still succeed. -1: all
int alloc_left = -1;

// what new buffers are filled with. -1: nothing
int alloc_fill = -1;

void * ggml_backend_buft_alloc_buffer(void * buft, size_t size) {
    if (alloc_left >= 0 && alloc_left-- == 0) {
        return NULL;
    }
    void * buffer = alloc_next(buft, size);
    if (buffer && size && alloc_fill >= 0) {
        alloc_clear(buffer, (uint8_t) alloc_fill);
    }
    return buffer;
}
