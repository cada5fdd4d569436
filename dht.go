package main

// One DHT request's way, from the stream that it comes on to the answer.
//
// The engine is kad-dht. It reads requests from the streams of its host, and writes the
// answers to them. kadHost gives it streams of ours, which bound what is read
// (frameReader) and replace the peers that kad-dht names in its answer (answers). In
// between, kad-dht calls a hook with each request. The hook counts the request, and
// removes from its record what clients do not use.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	dht "github.com/libp2p/go-libp2p-kad-dht"
	kadpb "github.com/libp2p/go-libp2p-kad-dht/pb"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"
)

// kadServer has the rooms that a request passes on its way.
type kadServer struct {
	answers *answers
	groups  *groups
	records *recordStore
	peers   *peers
	tally   *tally
}

// serve answers DHT requests to h, and makes none of its own. Close the DHT that it
// returns before h.
func (k *kadServer) serve(h host.Host) (*dht.IpfsDHT, error) {
	return dht.New(kadHost{h, k},
		dht.Mode(dht.ModeServer),
		// On the prefix /ipfs kad-dht insists on IPFS's two validators, so it
		// gets another one, and the protocol by itself.
		dht.ProtocolPrefix("/privstack"),
		dht.V1ProtocolOverride(kadProtocol),
		dht.Validator(newestWins{}),
		dht.Datastore(k.records),
		dht.MaxRecordAge(maxRecordAge),
		dht.ValueGCInterval(0), // recordStore drops by itself what is too old
		dht.DisableProviders(), // unbounded, and clients have none
		// answers takes nobody from the routing table, so nobody is in it: no
		// lookup checks, and no refreshing, which would dial what clients name.
		dht.LookupCheckConcurrency(0),
		dht.DisableAutoRefresh(),
		dht.OnRequestHook(k.hook),
	)
}

// hook sees each request before kad-dht handles it. If a record must not be stored, hook
// takes it out of the request, and kad-dht then resets the stream.
func (k *kadServer) hook(_ context.Context, s network.Stream, req *kadpb.Message) {
	s.(*kadStream).request = req
	k.tally.dhtRequest(req.GetType())
	// No request has a use for these peers. One of two bytes takes more than a hundred.
	req.CloserPeers, req.ProviderPeers = nil, nil
	// An answer with mates depends on what the client says in identify. Wait for that
	// here, where nothing has been allocated for the answer yet.
	if len(k.answers.mates(s.Conn().RemotePeer(), req)) > 0 {
		k.peers.awaitIdentify(s.Conn())
	}
	if req.GetType() != kadpb.Message_PUT_VALUE {
		req.Record = nil // a request without a use for one
	} else if err := checkRecord(req); err != nil {
		k.tally.refuse(refusedRecord)
		req.Record = nil
	} else {
		k.records.expect(req.Record, holderOf(s.Conn()))
		id := s.Conn().RemotePeer()
		k.groups.put(string(req.GetKey()), id, time.Now())
		if !k.peers.connected(id) { // it has left meanwhile
			k.groups.leave(id)
		}
	}
}

// checkRecord returns why the record in req must not be stored, or nil. It removes
// fields that clients do not use, so that they are neither stored nor passed on. What the
// value says is the clients' business.
func checkRecord(req *kadpb.Message) error {
	rec := req.GetRecord()
	if rec == nil {
		return errors.New("no record")
	}
	key, value := string(rec.GetKey()), rec.GetValue()
	switch {
	case !bytes.Equal(req.GetKey(), rec.GetKey()):
		return errors.New("the record has another key than the request")
	case !strings.HasPrefix(key, recordPrefix) || len(key) == len(recordPrefix):
		return errors.New("key is not under " + recordPrefix)
	case len(key) > maxRecordKey:
		return fmt.Errorf("key of %d bytes is above %d", len(key), maxRecordKey)
	case len(value) == 0:
		return errors.New("value is empty")
	case len(value) > maxRecordValue:
		return fmt.Errorf("value of %d bytes is above %d", len(value), maxRecordValue)
	}
	extras, err := readExtras(rec)
	if err != nil {
		return err
	}
	if len(extras.encoded) > maxRecordExtras {
		return fmt.Errorf("publisher and ttl of %d bytes are above %d", len(extras.encoded), maxRecordExtras)
	}
	rec.ProtoReflect().SetUnknown(extras.encoded)
	return nil
}

// newestWins is kad-dht's validator. It accepts every record, because checkRecord has
// looked at it before, and the one that arrives replaces the one that is stored. All
// devices of a group share one key, and the last to write it must be the one found.
// A timestamp inside is no guide: a device with a slow clock would never be found.
type newestWins struct{}

func (newestWins) Validate(string, []byte) error { return nil }

// Select prefers values[0], which is the one arriving.
func (newestWins) Select(string, [][]byte) (int, error) { return 0, nil }

// kadHost is kad-dht's host: its streams are kadStreams.
type kadHost struct {
	host.Host
	server *kadServer
}

func (h kadHost) SetStreamHandler(id protocol.ID, handle network.StreamHandler) {
	h.Host.SetStreamHandler(id, func(s network.Stream) {
		handle(&kadStream{Stream: s, server: h.server, frames: frameReader{tally: h.server.tally}})
	})
}

// kadStream is a stream on which kad-dht reads requests and writes an answer to
// each. One goroutine reads and writes it.
//
// A client that does not read its answer keeps the answer in our memory. So Write only
// gathers an answer, and the next Read sends it: by then kad-dht has let go of the
// request and of its own answer, which took 75 to 115 KiB.
type kadStream struct {
	network.Stream
	server *kadServer
	frames frameReader

	// request is the one being handled; nil: none. hook sets it.
	request *kadpb.Message

	asked bool // a request has begun

	// answer holds what kad-dht has written of an answer so far or, if whole, the
	// amended answer with its length, ready to send.
	answer []byte
	whole  bool

	// booked is how much memory is reserved for the request and its answer, in bytes.
	booked int
}

func (s *kadStream) Read(p []byte) (int, error) {
	if s.whole {
		if err := s.send(); err != nil {
			return 0, err
		}
	}
	n, err := s.Stream.Read(p)
	longest, frameErr := s.frames.follow(p[:n])
	if frameErr != nil {
		return 0, frameErr
	}
	s.pay(longest)
	// kad-dht allocates a buffer when it has read the length of a message, and copies
	// the message once more when it parses it.
	if bookErr := s.book(2 * longest); bookErr != nil {
		return 0, bookErr
	}
	return n, err
}

// pay takes a request of that length from the budget of the client's network, and waits
// if there is none left. kad-dht does not know the length yet, so nothing is allocated
// meanwhile. A long request costs more: one of 16 KiB can have 8 000 empty parts, and to
// parse them takes kad-dht a millisecond and a megabyte. length is 0 if no request has
// begun.
func (s *kadStream) pay(length int) {
	if length == 0 {
		return
	}
	n := 1 + length/freeKadMessage
	if !s.asked { // one was paid for when the stream was accepted
		s.asked, n = true, n-1
	}
	piecesOf(s.Conn()).wait(n)
}

// book raises what is reserved to n bytes. Up to freeKadMessage nothing is reserved,
// because streamMemory covers that.
func (s *kadStream) book(n int) error {
	if n <= max(s.booked, freeKadMessage) {
		return nil
	}
	if err := s.Scope().ReserveMemory(n-s.booked, network.ReservationPriorityHigh); err != nil {
		s.server.tally.refuse(refusedMemory)
		return err
	}
	s.booked = n
	return nil
}

// send sends the answer that has been gathered.
func (s *kadStream) send() error {
	s.Stream.SetWriteDeadline(time.Now().Add(answerTimeout))
	_, err := s.Stream.Write(s.answer)
	s.answer, s.whole = nil, false // a stream may idle for a minute
	if s.booked > 0 {
		s.Scope().ReleaseMemory(s.booked)
		s.booked = 0
	}
	return err
}

// Write gathers an answer, which kad-dht writes in pieces as a varint length and
// that many bytes (kad-dht spec, RPC messages), and amends it. The next Read sends it.
func (s *kadStream) Write(p []byte) (int, error) {
	s.answer = append(s.answer, p...)
	length, n := binary.Uvarint(s.answer)
	if n <= 0 || uint64(len(s.answer)-n) < length {
		return len(p), nil // not yet whole
	}
	amended, err := s.amend(s.answer[n:])
	if err != nil {
		return 0, err
	}
	s.request = nil
	s.answer = append(binary.AppendUvarint(make([]byte, 0, len(amended)+binary.MaxVarintLen16+1), uint64(len(amended))), amended...)
	s.whole = true
	return len(p), s.book(len(s.answer))
}

// amend replaces the peers that kad-dht's answer names. That adds nothing measurable to
// the 0.3 ms of a request (BenchmarkAnswer).
func (s *kadStream) amend(answer []byte) ([]byte, error) {
	if t := s.request.GetType(); t != kadpb.Message_FIND_NODE && t != kadpb.Message_GET_VALUE {
		return answer, nil
	}
	resp := new(kadpb.Message)
	if err := proto.Unmarshal(answer, resp); err != nil {
		return nil, err
	}
	resp.CloserPeers = kadpb.PeerInfosToPBPeers(s.server.peers.network, s.server.answers.choose(s.Conn(), s.request))
	return proto.Marshal(resp)
}

var errKadMessageTooLong = fmt.Errorf("DHT message is above %d bytes", maxKadMessage)

// frameReader finds the frames in what is read from a stream. Each is a varint length and
// that many bytes (kad-dht spec, RPC messages).
type frameReader struct {
	tally  *tally
	body   uint64 // bytes left of the current frame
	header []byte // of the next frame, while incomplete
}

// follow returns the longest of the lengths whose last byte is in read. It fails at a
// length above maxKadMessage. kad-dht has not seen that last byte yet, so it cannot have
// allocated for such a message.
func (r *frameReader) follow(read []byte) (longest int, err error) {
	for len(read) > 0 {
		if skip := min(r.body, uint64(len(read))); skip > 0 {
			r.body -= skip
			read = read[skip:]
			continue
		}
		r.header = append(r.header, read[0])
		read = read[1:]
		length, size := binary.Uvarint(r.header)
		switch {
		case size == 0 && len(r.header) < binary.MaxVarintLen64: // needs more
			continue
		case size <= 0 || length > maxKadMessage:
			r.tally.refuse(refusedMessage)
			return 0, errKadMessageTooLong
		}
		longest = max(longest, int(length))
		r.body, r.header = length, r.header[:0]
	}
	return longest, nil
}
