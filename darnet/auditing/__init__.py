"""What a cohort would teach a network besides disease: leaks, duplicates, shortcuts, reversed slices."""
