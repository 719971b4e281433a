"""Requests of users: texts to ids and back, and what a fork leaves of a loaded model."""
