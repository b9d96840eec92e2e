/* A disk with hard links only within a folder (WSIFLOW_LINKS=folder) or without any (none); where
   WSIFLOW_RENAMES=plain, renames of it always overwrite. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int is_refused(const char *from, const char *to) {
    const char *kind = getenv("WSIFLOW_LINKS"), *from_end = strrchr(from, '/'), *to_end = strrchr(to, '/');
    long length = from_end ? from_end - from : 0;
    if (!kind) return 0;
    return !strcmp(kind, "none") || length != (to_end ? to_end - to : 0) || strncmp(from, to, length);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    int (*real)(int, const char *, int, const char *, int) = dlsym(RTLD_NEXT, "linkat");
    if (is_refused(from, to)) return errno = EPERM, -1;
    return real(from_folder, from, to_folder, to, flags);
}

int link(const char *from, const char *to) {
    int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "link");
    if (is_refused(from, to)) return errno = EPERM, -1;
    return real(from, to);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned flags) {
    int (*real)(int, const char *, int, const char *, unsigned) = dlsym(RTLD_NEXT, "renameat2");
    if (getenv("WSIFLOW_RENAMES")) return errno = EINVAL, -1;
    return real(from_folder, from, to_folder, to, flags);
}
