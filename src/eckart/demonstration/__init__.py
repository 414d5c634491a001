"""The embedded models, their texts, and the story that `eckart demo` tells of them."""
