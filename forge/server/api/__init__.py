"""The endpoints, a file for each. Source: https://platform.openai.com/docs/api-reference, https://docs.claude.com"""
