package kv_test

import (
	"bytes"
	"fmt"

	"pontoon/kv"
)

// A log entry on its way: encoded, decoded once it is committed, applied, and
// applied again because it was proposed twice.
func ExampleState_Apply() {
	put := kv.AppendCommand(nil, &kv.Command{Op: kv.OpPut, Key: "sky", Value: []byte("blue")})
	del := kv.AppendCommand(nil, &kv.Command{Op: kv.OpDelete, Key: "moon"})
	entry := kv.AppendBatch(nil, 1, 1, 1, put, del)

	state := kv.NewState()
	for index := range uint64(2) {
		var batch kv.Batch
		if err := kv.DecodeBatch(entry, &batch); err != nil {
			fmt.Println(err)
			return
		}
		for _, r := range state.Apply(index+1, &batch, nil) {
			fmt.Printf("revision %d, existed %v, duplicate %v\n", r.Revision, r.Existed, r.Duplicate)
		}
	}
	e, _ := state.Get("sky")
	fmt.Printf("%s is %s since revision %d\n", e.Key, e.Value, e.ModRevision)
	// Output:
	// revision 1, existed false, duplicate false
	// revision 1, existed false, duplicate false
	// revision 1, existed false, duplicate true
	// revision 1, existed false, duplicate true
	// sky is blue since revision 1
}

// A snapshot is written from a clone, so that the original can go on.
func ExampleWriteSnapshot() {
	state := kv.NewState()
	state.Apply(1, &kv.Batch{Commands: []kv.Command{{Op: kv.OpPut, Key: "sky", Value: []byte("blue")}}}, nil)

	clone := state.Clone()
	state.Apply(2, &kv.Batch{Commands: []kv.Command{{Op: kv.OpDelete, Key: "sky"}}}, nil)

	var file bytes.Buffer
	if err := kv.WriteSnapshot(&file, []byte("members: 1, 2, 3"), clone); err != nil {
		fmt.Println(err)
		return
	}
	header, restored, err := kv.ReadSnapshot(&file)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s; %d key at index %d; hash kept: %v\n", header, restored.Len(), restored.Applied(), restored.Hash() == clone.Hash())
	// Output: members: 1, 2, 3; 1 key at index 1; hash kept: true
}
