// Preloaded: memory that is filled with a byte, or not to be had. See test_out_of_memory.py and
// test_uninitialised_memory.py
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

extern "C" {

// the functions of libggml-base, which is not among the libraries that dlsym(RTLD_NEXT) searches
void * (*alloc_next)(void *, size_t);
void   (*alloc_clear)(void *, uint8_t);

// how many ggml buffers are still allocated. -1: all
int alloc_left = -1;

// what new buffers are filled with. -1: nothing
int alloc_fill = -1;

// ... and how many calls of operator new succeed. what was left of INT32_MAX tells how many there were
int new_left = -1;

void * ggml_backend_buft_alloc_buffer(void * buft, size_t size) {
    if (alloc_left >= 0 && alloc_left-- == 0) {
        return nullptr;
    }
    void * buffer = alloc_next(buft, size);
    if (buffer && size && alloc_fill >= 0) {
        alloc_clear(buffer, (uint8_t) alloc_fill);
    }
    return buffer;
}

}

void * operator new(size_t size) {
    void * res = new_left >= 0 && new_left-- == 0 ? nullptr : std::malloc(size ? size : 1);
    if (!res) {
        throw std::bad_alloc();
    }
    return res;
}

void operator delete(void * pointer) noexcept {
    std::free(pointer);
}

void operator delete(void * pointer, size_t) noexcept {
    std::free(pointer);
}
