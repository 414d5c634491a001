"""How factors are named on disk. Each format maps a matrix to tensors; none touches a file."""
