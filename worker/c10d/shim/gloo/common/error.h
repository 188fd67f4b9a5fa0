// Stands in for gloo's header of this name, which torch's wheels leave out. ProcessGroupGloo.hpp includes it
// but uses nothing from it: gloo's exceptions derive from std::exception, and that is how the shim catches
// them.
#pragma once
