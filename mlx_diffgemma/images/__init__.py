"""Files of pictures -> pixels that the vision tower reads; Pillow and numpy, nothing of MLX."""
