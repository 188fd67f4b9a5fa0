// Stands in for gloo's header of this name, which torch's wheels leave out. ProcessGroupGloo.hpp includes it
// but uses nothing from it. See context.h for the rule that these five files keep.
#pragma once
