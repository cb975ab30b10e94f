/* Preloaded into the tests' InfiniStore server, it undoes one fault of InfiniStore 0.2.35, which
 * ends the server at some time or changes what it serves.
 *
 *     cc -O2 -shared -fPIC -o libuv_poll_repair.so uv_poll_repair.c -ldl
 *
 * The server stops its uv_poll_t and never closes it. This takes the handle off libuv's list when it
 * is stopped, which is the last that happens to it.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>

struct link {
    struct link *next, *prev;
};

/* How every uv_handle_t of libuv 1 begins (UV_HANDLE_FIELDS in uv.h). */
struct handle {
    void *data, *loop;
    int type;
    void (*close_cb)(struct handle *);
    struct link listed;
};

int uv_poll_stop(struct handle *handle) {
    /* The caller's libuv isn't in the global scope, where RTLD_NEXT would look. */
    Dl_info caller;
    void *library = 0;
    if (dladdr(__builtin_return_address(0), &caller))
        library = dlopen(caller.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    int (*stop)(struct handle *) = library ? dlsym(library, "uv_poll_stop") : 0;
    if (!stop)
        abort();
    int answer = stop(handle);
    dlclose(library);
    handle->listed.prev->next = handle->listed.next;
    handle->listed.next->prev = handle->listed.prev;
    handle->listed.next = handle->listed.prev = &handle->listed;
    return answer;
}
