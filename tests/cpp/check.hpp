// What the C++ test programs check with: the first thing that is not so ends the program, and says where.
#ifndef CHECK_HPP
#define CHECK_HPP

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include <nblock.hpp>

inline void check_failed(const char *file, int line, const char *what, const char *message)
{
    std::fprintf(stderr, "%s:%d: %s%s%s\n", file, line, what, *message ? ": " : "", message);
    std::abort();
}

#define CHECK(...) ((__VA_ARGS__) ? void(0) : check_failed(__FILE__, __LINE__, "not so: " #__VA_ARGS__, ""))

// The expression throws exactly that class, with that code and with those words in it.
#define THROWS(type, errc_name, words, ...)                                                             \
    do {                                                                                                \
        try {                                                                                           \
            (void)(__VA_ARGS__);                                                                        \
        } catch (const nblock::error &caught) {                                                         \
            if (typeid(caught) != typeid(type) || caught.code() != nblock::errc::errc_name ||           \
                !std::strstr(caught.what(), words))                                                     \
                check_failed(__FILE__, __LINE__, "threw something else: " #__VA_ARGS__, caught.what()); \
            break;                                                                                      \
        }                                                                                               \
        check_failed(__FILE__, __LINE__, "threw nothing: " #__VA_ARGS__, "");                           \
    } while (0)

// Deletes the record of a key by force, as somebody else would.
inline void break_lock(const nblock::client &client, const std::string &key)
{
    const auto found = client.find(key);
    CHECK(found && found->break_());
}

inline bool is_free(const nblock::client &client, const std::string &key)
{
    return !client.find(key).has_value();
}

#endif
