"""The data of all benchmarks: files, tables with groups, what is planted in them, the tasks."""
