// Has the headers that tests share compiled once (tests/CMakeLists.txt).
