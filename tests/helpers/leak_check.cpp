// Everything that the evicting cache can do, once over, in a process that LeakSanitizer looks at (make sanitize):
// prompts that evict, answers that grow and are bounded, states saved and restored, contexts opened and closed.
//
//     leak_check MODEL.gguf

#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

static void decode(llama_context * ctx, int n_tokens, bool cancelled = false) {
    std::vector<llama_token> tokens(n_tokens);
    for (int i = 0; i < n_tokens; ++i) {
        tokens[i] = 10 + i%200;
    }

    const auto abort = [](void *) { return true; };
    llama_set_abort_callback(ctx, cancelled ? +abort : nullptr, nullptr);

    const int status = llama_decode(ctx, llama_batch_get_one(tokens.data(), n_tokens));
    if ((status != 0) != cancelled) {
        fprintf(stderr, "llama_decode returned %d\n", status);
        exit(1);
    }
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 1;
    }

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        fprintf(stderr, "cannot load %s\n", argv[1]);
        return 1;
    }

    const size_t n_heads = llama_model_n_layer(model)*llama_model_n_head_kv(model);

    std::vector<uint32_t> budgets(n_heads);
    for (size_t i = 0; i < n_heads; ++i) {
        budgets[i] = 20 + 5*(i%10);
    }

    for (uint32_t n_tail : { 0, 16 }) {
        llama_head_params heads = {};

        heads.enabled        = true;
        heads.head_budgets   = budgets.data();
        heads.n_head_budgets = n_heads;
        heads.n_window       = 8;
        heads.n_pool         = 7;
        heads.vote           = LLAMA_HEAD_VOTE_MIXKV;
        heads.residual       = true;
        heads.n_tail         = n_tail;

        llama_context_params params = llama_context_default_params();

        params.n_ctx     = 1024;
        params.n_batch   = 1024;
        params.n_ubatch  = 64;
        params.n_threads = params.n_threads_batch = 1;

        llama_context * ctx   = llama_init_from_model_heads(model, params, heads);
        llama_context * other = llama_init_from_model_heads(model, params, heads);
        if (!ctx || !other) {
            return 1;
        }

        llama_memory_t mem = llama_get_memory(ctx);

        for (int turn = 0; turn < 3; ++turn) {
            decode(ctx, 150, true);
            decode(ctx, 150);

            for (int i = 0; i < 70; ++i) {
                decode(ctx, 1);
            }
        }

        llama_kv_heads_stats stats;
        if (!llama_memory_heads_stats(mem, &stats) || stats.n_evictions != 3) {
            fprintf(stderr, "the cache did not evict\n");
            return 1;
        }

        std::vector<uint8_t> state(llama_state_get_size(ctx));
        llama_state_get_data(ctx, state.data(), state.size());

        if (llama_state_set_data(other, state.data(), state.size()) != state.size()) {
            fprintf(stderr, "the state is not taken back\n");
            return 1;
        }
        llama_state_set_data(other, state.data(), state.size()/2); // refused
        decode(other, 30);

        llama_memory_seq_rm(mem, 0, 10, 20); // refused
        llama_memory_seq_rm(mem, 0, -1, -1);
        decode(ctx, 5);

        llama_free(other);
        llama_free(ctx);
    }

    llama_model_free(model);
    llama_backend_free();

    printf("done\n");

    return 0;
}
