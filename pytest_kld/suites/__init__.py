"""Suite files: their keys, their reading, and the settings and Subjects that they ask for."""
