// The thread pool of the PyTorch that this binary is loaded into.
#pragma once

#include "common.h"

namespace codir_fast {

Executor torch_executor();

}  // namespace codir_fast
