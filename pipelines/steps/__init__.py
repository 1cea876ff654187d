"""The steps of a recipe as plain functions, and the pipeline of all of them; `job_main` runs one inside a Ray job."""
