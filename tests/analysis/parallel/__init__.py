"""Expert-parallel what-ifs, against hand-computed examples."""
