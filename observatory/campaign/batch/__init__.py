"""Campaigns that run as batch jobs: their points, their folder, submission, state and collection."""
