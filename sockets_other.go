//go:build !linux

package main

// Only Linux can do what sockets_linux.go does.

import "net"

func newUDPSocket(conn *net.UDPConn) udpSocket { return newPlainSocket(conn) }
