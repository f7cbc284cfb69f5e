/*
 * A main for a fuzz target without a fuzzer: runs each input once, files and
 * all files in directories, so that any compiler can run a corpus. AFL++ can
 * run it, too: "@@" is just a file.
 *
 * The last line counts inputs as tests. A finding ends the process, after a
 * line that starts with "replay:".
 *
 * SPDX-License-Identifier: MIT
 */
#if !defined(_POSIX_C_SOURCE)
#  define _POSIX_C_SOURCE 200809L        /* scandir */
#endif

#include <dirent.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
#ifdef FUZZ_INITIALIZE
int LLVMFuzzerInitialize(int *argc, char ***argv);
#endif

extern unsigned long fuzz_accepted;

/* An input that takes longer hangs. */
enum { SECONDS_MAX = 120 };

static const char *program;
static const char *input;                /* that runs now */
static unsigned long inputs;

static void say(const char *text)
{
    size_t left = strlen(text);

    while (left > 0) {
        ssize_t n = write(2, text, left);

        if (n <= 0) return;
        text += n;
        left -= (size_t)n;
    }
}

/* Only calls that are safe in a signal handler. */
static void on_signal(int number)
{
    say(number == SIGALRM ? "fuzz: hangs\n" : "fuzz: ended by a signal\n");
    say("replay: ");
    say(program);
    say(" ");
    say(input ? input : "");
    say("\n");
    signal(number, SIG_DFL);
    raise(number == SIGALRM ? SIGABRT : number);
}

/* Seeds and scripts are well-formed, unless the format has changed. */
static int must_be_accepted(const char *path)
{
    const char *name = strrchr(path, '/');
    size_t n = strlen(path);

    name = name ? name + 1 : path;
    return strncmp(name, "seed-", 5) == 0
        || (n > 4 && strcmp(path + n - 4, ".ops") == 0);
}

static int run_file(const char *path)
{
    unsigned long accepted = fuzz_accepted;
    FILE *file = fopen(path, "rb");
    uint8_t *data = NULL;
    size_t bytes = 0, cap = 0, n = 1;

    if (!file) {
        perror(path);
        return 1;
    }
    while (n > 0) {
        if (bytes == cap) {
            cap = 2 * cap + 4096;
            data = realloc(data, cap);
            if (!data) abort();
        }
        n = fread(data + bytes, 1, cap - bytes, file);
        bytes += n;
    }
    fclose(file);
    input = path;
    alarm(SECONDS_MAX);
    LLVMFuzzerTestOneInput(data, bytes);
    alarm(0);
    input = NULL;
    free(data);
    inputs++;
    if (fuzz_accepted == accepted && must_be_accepted(path)) {
        printf("%s is not well-formed any more: make seeds\n", path);
        return 1;
    }
    return 0;
}

static int not_hidden(const struct dirent *entry)
{
    return entry->d_name[0] != '.';
}

static int run_path(const char *path)
{
    struct dirent **names;
    struct stat info;
    char *inner;
    int n, failed = 0;

    if (stat(path, &info) != 0) {
        perror(path);
        return 1;
    }
    if (!S_ISDIR(info.st_mode)) return run_file(path);
    n = scandir(path, &names, not_hidden, alphasort);
    for (int i = 0; i < n; i++) {
        size_t bytes = strlen(path) + strlen(names[i]->d_name) + 2;

        inner = malloc(bytes);
        if (!inner) abort();
        snprintf(inner, bytes, "%s/%s", path, names[i]->d_name);
        failed |= run_path(inner);
        free(inner);
        free(names[i]);
    }
    if (n >= 0) free(names);
    return failed;
}

int main(int argc, char **argv)
{
    static const int signals[] = {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL,
                                  SIGALRM};
    int failed = 0;

    program = argv[0];
#ifdef FUZZ_INITIALIZE
    LLVMFuzzerInitialize(&argc, &argv);
#endif
    for (size_t i = 0; i < sizeof signals / sizeof signals[0]; i++)
        signal(signals[i], on_signal);
    for (int i = 1; i < argc; i++)
        if (argv[i][0] != '-') failed |= run_path(argv[i]);
    if (failed || inputs == 0) {
        printf("[  FAILED  ] %lu test(s) were run.\n", inputs);
        return 1;
    }
    printf("%lu of %lu inputs are well-formed\n", fuzz_accepted, inputs);
    printf("[  PASSED  ] %lu test(s).\n", inputs);
    return 0;
}
