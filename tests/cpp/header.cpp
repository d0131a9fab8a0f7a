// The header compiles alone, as the first line of a program, twice, and in two translation units.
#include <nblock.hpp>
#include <nblock.hpp>

const std::error_category *category_in_second_unit();

int main()
{
    nblock::client client("memory:");
    nblock::lock lock(client, "header");
    // Were it another object in each unit, codes would not compare equal.
    return lock.synchronize([] { return category_in_second_unit() == &nblock::category(); }) ? 0 : 1;
}
