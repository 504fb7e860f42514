# Fails when an object compiled for one instruction set defines a shared inline function outside that set's namespace:
# the linker keeps one copy of such a function for everybody, and it may be the one an older CPU cannot run.
# Arguments: NM, ISA, OBJECT.
execute_process(COMMAND "${NM}" -C --defined-only "${OBJECT}" OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]+" weak "${symbols}")
list(FILTER weak EXCLUDE REGEX "tgi::${ISA}::")
if(weak)
  list(JOIN weak "\n  " weak)
  message(FATAL_ERROR "${OBJECT} defines functions outside tgi::${ISA}:\n  ${weak}")
endif()
