// The second translation unit of header.cpp.
#include <nblock.hpp>

const std::error_category *category_in_second_unit();

const std::error_category *category_in_second_unit()
{
    return &nblock::category();
}
