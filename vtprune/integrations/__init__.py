# SPDX-License-Identifier: Apache-2.0
"""vtprune inside other projects. Each integration is imported by its host, never by the library."""
