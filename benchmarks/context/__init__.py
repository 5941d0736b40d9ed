"""Context parallelism: time, memory and traffic of one sequence split over ranks."""
